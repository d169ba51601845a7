pip install specql

# Copy service registry
cp examples/multi-execution/registry/service_registry.yaml registry/

# Set environment variables
export STRIPE_API_KEY="sk_test_..."
export SENDGRID_API_KEY="SG...."

specql generate-schema examples/multi-execution/entities/

# Process a payment
specql execute-job --entity payment --action process_payment

# Generate a report
specql execute-job --entity report --action generate_pdf

# Run ML prediction
specql execute-job --entity prediction --action classify_image
