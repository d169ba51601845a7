package auth

import "strings"

// methods are the roles that methods need. A method that is not here is refused to everybody.
var methods = map[string]Role{
	"/specql.v1.OrchestratorService/GetRun":        Viewer,
	"/specql.v1.OrchestratorService/ListRuns":      Viewer,
	"/specql.v1.OrchestratorService/WatchRun":      Viewer,
	"/specql.v1.OrchestratorService/ExecuteAction": Operator,
	"/specql.v1.OrchestratorService/CancelRun":     Operator,
	"/specql.v1.OrchestratorService/RetryRun":      Operator,
	"/specql.v1.OrchestratorService/SignalRun":     Operator,

	"/specql.v1.RegistryService/GetRegistry":       Viewer,
	"/specql.v1.RegistryService/ListRunners":       Viewer,
	"/specql.v1.RegistryService/ValidateRegistry":  Viewer,
	"/specql.v1.RegistryService/ApplyRegistry":     Admin,
	"/specql.v1.RegistryService/SetExecutionTypes": Viewer, // who sees them; it asks for Admin before it changes one

	"/specql.v1.InsightService/GetPerformance":     Viewer,
	"/specql.v1.InsightService/GetResourceUsage":   Viewer,
	"/specql.v1.InsightService/GetFailurePatterns": Viewer,
	"/specql.v1.InsightService/GetSecurityAudit":   Viewer,
	"/specql.v1.InsightService/ReplayPolicy":       Viewer,
	"/specql.v1.InsightService/ListAlerts":         Viewer,
	"/specql.v1.InsightService/GetQueueHealth":     Viewer,
	"/specql.v1.InsightService/GetCost":            Viewer,

	"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo":      Viewer,
	"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Viewer,
}

// open tells the methods that need no identity: supervisors ask for the health.
func open(method string) bool { return strings.HasPrefix(method, "/grpc.health.v1.Health/") }
