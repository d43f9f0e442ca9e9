"""Names and arrays between this project and other formats."""
