"""An index after its build: append, delete, compact, verify, rebuild; each is one commit."""
