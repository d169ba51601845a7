module github.com/specql/mesh/test/faults

go 1.26.0

replace github.com/specql/mesh/gen => ../../gen

replace github.com/specql/mesh/pkg => ../../pkg

replace github.com/specql/mesh/test/pgtest => ../pgtest

require (
	github.com/jackc/pgx/v5 v5.12.0
	github.com/specql/mesh/gen v0.0.0
	github.com/specql/mesh/pkg v0.0.0
	github.com/specql/mesh/test/pgtest v0.0.0
	github.com/stretchr/testify v1.12.1
	go.uber.org/goleak v1.3.0
	golang.org/x/net v0.60.0
	golang.org/x/sync v0.24.0
)

require (
	github.com/jackc/pgpassfile v1.0.0 // indirect
	github.com/jackc/pgservicefile v0.0.0-20240606120523-5a60cdf6a761 // indirect
	github.com/jackc/puddle/v2 v2.2.3 // indirect
	go.yaml.in/yaml/v3 v3.0.5 // indirect
	golang.org/x/sys v0.49.0 // indirect
	golang.org/x/text v0.42.0 // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20261019180522-ce908d29299b // indirect
	google.golang.org/grpc v1.85.0 // indirect
	google.golang.org/protobuf v1.36.12 // indirect
)
