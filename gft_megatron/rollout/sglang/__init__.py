"""Samples from SGLang servers: their clients, their health, their weights. SGLang itself is never imported."""
