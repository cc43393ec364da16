"""Speed and memory of the router beside the least that its parts could cost. ``make bench`` runs it."""
