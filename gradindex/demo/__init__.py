"""The demos: small models of the Python standard library, made where they are needed."""
