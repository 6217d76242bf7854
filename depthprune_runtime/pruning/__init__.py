"""Pruning methods: each decides a `PrunePlan`; `surgery` carries it out."""
