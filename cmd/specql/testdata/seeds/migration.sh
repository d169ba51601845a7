# Update to multi-execution enabled version
pip install specql>=2.0.0

# Verify installation
specql --version

# Run schema migration (adds new columns with defaults)
specql migrate-schema

# Verify schema changes
specql validate-schema

# Validate existing service registry
specql validate-config registry/service_registry.yaml

# Check for deprecated patterns
specql migration-check registry/service_registry.yaml

# Load test HTTP execution
specql load-test --service http_service --concurrency 100

# Load test shell execution
specql load-test --service shell_service --concurrency 50

# Compare performance
specql benchmark --services http_service shell_service docker_service

# Disable new execution types
specql execution-types --disable shell docker serverless

# Revert to HTTP-only
specql rollback --to http-only

# Restore original service registry
git checkout HEAD~1 registry/service_registry.yaml

# Check database permissions
specql check-permissions

# Manual migration
psql -d your_database -f migrations/001_multi_execution.sql

# Verify migration
specql validate-schema

# Detailed validation
specql validate-config registry/service_registry.yaml --verbose

# Fix common issues
# - Check YAML indentation
# - Verify environment variables exist
# - Confirm absolute command paths

# Profile execution
specql profile --service migrated_service

# Check resource limits
specql resource-check --service migrated_service

# Optimize configuration
# - Reduce resource limits
# - Enable caching
# - Use connection pooling

# Audit security violations
specql security-audit --service problematic_service

# Update allowlists
# - Add missing commands to allowed_commands
# - Add missing images to allowed_images
# - Adjust resource limits
