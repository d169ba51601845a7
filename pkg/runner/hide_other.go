//go:build !linux

package runner

// HideProcess leaves no core dump, where the system can.
func HideProcess() Feature {
	return Feature{Name: "no_core_dump", Detail: "this system is not Linux"}
}
