module github.com/specql/mesh/test/imports

go 1.26.0
