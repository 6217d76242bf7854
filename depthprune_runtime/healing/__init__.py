"""Healing: training of what lies behind the first edit, by distillation from the dense parent."""
