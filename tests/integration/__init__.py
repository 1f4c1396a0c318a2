"""Tests against a real tritonserver. They need what `make setup` makes: the default models and tritonserver."""
