"""HTTP: the application, its routes and its bodies. No SQL and no tensors."""
