"""Can the classes be told apart without looking at the pixels, and do splits share images?"""
