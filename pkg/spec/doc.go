// Package spec holds the language of the system: the service registry, entities with their actions, and workflows.
//
// Everything here is pure. Parsing takes named bytes and, for the registry, a function that looks environment variables up; it
// gives typed values and every problem at once, each with its place in the file and how to mend it. What the
// runners own (runner_config, security_policy and the call settings of an operation) stays opaque. What needs
// more than one document, such as whether a step's service exists, is checked by who has them all.
package spec

// Bounds on documents. What is larger is refused.
const (
	// MaxFileBytes bounds one document.
	MaxFileBytes = 4 << 20
	// MaxDepth bounds the nesting of a document.
	MaxDepth = 100

	maxNodes        = 500_000 // values of one document, those of aliases counted each time
	maxAliasedNodes = 50_000  // values that aliases and merge keys may add
	maxProblems     = 1000    // problems that are kept
	maxSuggestions  = 200     // "did you mean" of one document
	maxExpressions  = 5000    // CEL expressions of one document
	maxFields       = 1000    // fields of one entity; PostgreSQL has 1600 columns at most
	maxNameBytes    = 128     // a service's, operation's, action's name
)

// File is a document and the name that its problems carry, usually its path.
type File struct {
	Name    string
	Content []byte
}

// Options say how a document is read. The zero value reads a registry without an overlay and leaves `${NAME}` as it is.
type Options struct {
	// Env names the overlay of the registry that is merged over its base; empty for none.
	Env string
	// LookupEnv gives the variables for `${NAME}` in the registry. With nil they are left as they are.
	LookupEnv func(name string) (string, bool)
	// Strict makes every warning an error.
	Strict bool
}
