"""A first study file, drafted from the data that a person has."""
