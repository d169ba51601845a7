// Command sbom writes what a Go program was built of, and the Debian packages beside it, as a CycloneDX document.
package main

import (
	"bufio"
	"debug/buildinfo"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
)

type component struct {
	Type    string `json:"type"`
	Name    string `json:"name"`
	Version string `json:"version,omitempty"`
	PURL    string `json:"purl,omitempty"`
}

type document struct {
	Format   string `json:"bomFormat"`
	Spec     string `json:"specVersion"`
	Version  int    `json:"version"`
	Metadata struct {
		Component component `json:"component"`
	} `json:"metadata"`
	Components []component `json:"components"`
}

func main() {
	name := flag.String("name", "", "name of the image")
	version := flag.String("version", "", "version of the image")
	packages := flag.String("packages", "", "file with a line 'NAME VERSION ARCHITECTURE' for each Debian package")
	flag.Parse()
	if err := write(*name, *version, *packages, flag.Arg(0)); err != nil {
		fmt.Fprintln(os.Stderr, "sbom:", err)
		os.Exit(1)
	}
}

func write(name, version, packages, program string) error {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return err
	}
	d := document{Format: "CycloneDX", Spec: "1.6", Version: 1}
	d.Metadata.Component = component{Type: "container", Name: name, Version: version}
	d.Components = []component{
		{Type: "application", Name: info.Path, Version: version, PURL: "pkg:golang/" + info.Path + "@" + version},
		{Type: "library", Name: "stdlib", Version: strings.TrimPrefix(info.GoVersion, "go"), PURL: "pkg:golang/stdlib@" + strings.TrimPrefix(info.GoVersion, "go")},
	}
	for _, m := range info.Deps {
		if m.Replace != nil && m.Replace.Version != "" {
			m = m.Replace
		}
		v := m.Version
		if strings.HasPrefix(m.Path, info.Main.Path[:strings.LastIndex(info.Main.Path, "/mesh/")+len("/mesh/")]) {
			v = version // a module of this repository
		}
		d.Components = append(d.Components, component{Type: "library", Name: m.Path, Version: v, PURL: "pkg:golang/" + m.Path + "@" + v})
	}
	list, err := os.Open(packages)
	if err != nil {
		return err
	}
	defer list.Close()
	for lines := bufio.NewScanner(list); lines.Scan(); {
		if f := strings.Fields(lines.Text()); len(f) == 3 {
			d.Components = append(d.Components, component{Type: "library", Name: f[0], Version: f[1], PURL: fmt.Sprintf("pkg:deb/debian/%s@%s?arch=%s", f[0], f[1], f[2])})
		}
	}
	out := json.NewEncoder(os.Stdout)
	out.SetIndent("", "  ")
	return out.Encode(d)
}
