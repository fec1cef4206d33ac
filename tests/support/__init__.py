"""Helpers that several test files need: one module a subject, imported by tests and never the other way around."""
