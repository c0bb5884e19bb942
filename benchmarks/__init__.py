"""The figures of the product, each as a ratio to something run beside it. ``python -m benchmarks`` runs them all."""
