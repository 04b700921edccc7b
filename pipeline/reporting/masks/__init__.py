"""What masks hide of images, drawn."""
