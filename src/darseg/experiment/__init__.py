"""An experiment: variants, label budgets, seeds and controls in, statistics out."""
