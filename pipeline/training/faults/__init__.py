"""What watches over a run and decides when something goes wrong."""
