package local

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	multiexecution "github.com/specql/mesh/examples/multi-execution"
	"github.com/specql/mesh/pkg/spec"
)

// Where the documents of a folder are.
const (
	registryFile   = "registry/service_registry.yaml"
	entitiesFolder = "entities"
	examplesFolder = "examples/multi-execution"
)

// Variables of the examples' registry.
const (
	examplesPrefix = "SPECQL_EXAMPLES_"
	examplesDir    = "SPECQL_EXAMPLES_DIR"
)

// Documents are what a mesh serves.
type Documents struct {
	Registry spec.File
	Entities []spec.File
	// Env is the overlay; empty for none.
	Env string
	// Examples is the folder of the bundled examples where the registry is theirs or a copy
	// of it, else empty.
	Examples string
}

// Load reads the registry and the entities from the places given or, where one is not
// given, from the working folder; where that has neither, the bundled examples. Without an
// env, the overlay named development is used if there is one.
func Load(registry, entities, env, data string) (Documents, error) {
	d := Documents{Env: env}
	if registry == "" && Exists(registryFile) {
		registry = registryFile
	}
	if entities == "" && Exists(entitiesFolder) {
		entities = entitiesFolder
	}
	bundled := registry == "" && entities == ""
	if registry == "" && !bundled {
		return d, errors.New("there are entities but no registry: give --registry, or write " + registryFile)
	}
	if bundled {
		dir, err := examples(data)
		if err != nil {
			return d, err
		}
		d.Examples = dir
		registry, entities = filepath.Join(dir, filepath.FromSlash(registryFile)), filepath.Join(dir, entitiesFolder)
	}
	var err error
	if d.Registry, err = ReadFile(registry); err != nil {
		return d, fmt.Errorf("--registry: %w", err)
	}
	if d.Examples == "" && bytes.Contains(d.Registry.Content, []byte("${"+examplesPrefix)) {
		if d.Examples, err = examples(data); err != nil {
			return d, err
		}
		if entities == "" {
			entities = filepath.Join(d.Examples, entitiesFolder)
		}
	}
	if entities != "" {
		if d.Entities, err = ReadEntities(entities); err != nil {
			return d, fmt.Errorf("--entities: %w", err)
		}
	}
	if d.Env == "" {
		// What is wrong with the registry is said when it is served.
		r, _ := spec.ParseRegistry(d.Registry, spec.Options{LookupEnv: func(string) (string, bool) { return "", true }})
		if r != nil && slices.Contains(r.Envs, "development") {
			d.Env = "development"
		}
	}
	return d, nil
}

// Examples are the bundled examples, whatever the working folder has.
func Examples(data string) (Documents, error) {
	dir, err := examples(data)
	if err != nil {
		return Documents{}, err
	}
	return Load(filepath.Join(dir, filepath.FromSlash(registryFile)), filepath.Join(dir, entitiesFolder), "", data)
}

// examples is the folder of the bundled examples: that of the checkout where there is one,
// else a copy in the data folder.
func examples(data string) (string, error) {
	if dir := os.Getenv(examplesDir); dir != "" {
		return filepath.Abs(dir)
	}
	if Exists(filepath.Join(examplesFolder, filepath.FromSlash(registryFile))) {
		return filepath.Abs(examplesFolder)
	}
	dir, err := filepath.Abs(filepath.Join(data, "examples"))
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(data, 0o700); err != nil {
		return "", fmt.Errorf("the data folder: %w", err)
	}
	if err := unpack(multiexecution.FS, dir); err != nil {
		return "", fmt.Errorf("unpacking the examples: %w", err)
	}
	return dir, nil
}

// Workflow is a workflow of the bundled examples.
func Workflow(name string) (string, error) {
	raw, err := fs.ReadFile(multiexecution.FS, "workflows/"+name)
	return string(raw), err
}
