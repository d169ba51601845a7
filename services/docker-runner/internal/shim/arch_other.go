//go:build !amd64 && !arm64

package shim

const architecture = 0
