"""A generated world of pictures: does attention to the image, as a reward, make a model say what it sees?"""
