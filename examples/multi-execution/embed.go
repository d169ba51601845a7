// Package multiexecution holds the multi-execution examples, so that one binary can bring
// them along.
package multiexecution

import "embed"

// FS holds the examples as they lie in this folder.
//
//go:embed all:http all:shell all:docker all:serverless all:entities all:registry all:workflows README.md
var FS embed.FS
