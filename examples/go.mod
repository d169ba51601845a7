module github.com/specql/mesh/examples

go 1.26.0
