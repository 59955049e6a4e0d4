"""Whether kernels compute what they should: error budgets, cases to try, the validation report."""
