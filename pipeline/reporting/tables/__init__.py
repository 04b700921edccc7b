"""What papers and this report print: tables of results, as text, CSV and LaTeX."""
