"""How ImageNet's images are normalised, for tests of transforms."""

LOOK = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of red, green, blue
