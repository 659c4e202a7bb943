"""Where a network looks: class-activation maps, how they are shown, and whether they can be believed."""
