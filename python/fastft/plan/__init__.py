"""What a run will take of a card, of RAM, of the disk and of time, before any weight is read."""
