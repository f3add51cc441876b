"""Many runs: launching, supervising, and what MLflow and Optuna know of them."""
