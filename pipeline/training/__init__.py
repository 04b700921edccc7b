"""One run: stages -> engine -> step -> metrics -> checkpoint."""
