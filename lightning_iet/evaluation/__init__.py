"""What Evaluation, the audit and the benchmark measure."""
