module github.com/specql/mesh/test/ddl

go 1.26.0

replace github.com/specql/mesh/gen => ../../gen

replace github.com/specql/mesh/migrations => ../../migrations

replace github.com/specql/mesh/pkg => ../../pkg

replace github.com/specql/mesh/test/pgtest => ../pgtest

require (
	github.com/specql/mesh/migrations v0.0.0
	github.com/specql/mesh/pkg v0.0.0
	github.com/specql/mesh/test/pgtest v0.0.0
	github.com/stretchr/testify v1.12.1
	go.uber.org/goleak v1.3.0
)

require (
	cel.dev/cel-go v0.33.2 // indirect
	cel.dev/expr v0.25.3 // indirect
	github.com/antlr4-go/antlr/v4 v4.13.1 // indirect
	github.com/santhosh-tekuri/jsonschema/v6 v6.0.3 // indirect
	go.yaml.in/yaml/v3 v3.0.5 // indirect
	go.yaml.in/yaml/v4 v4.0.0 // indirect
	golang.org/x/exp v0.0.0-20260820142414-ca536658362e // indirect
	golang.org/x/text v0.42.0 // indirect
	google.golang.org/genproto/googleapis/api v0.0.0-20260928230214-8a89bd6388cc // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20261019180522-ce908d29299b // indirect
	google.golang.org/protobuf v1.36.12 // indirect
)
