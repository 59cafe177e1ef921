"""Which list is best here? Recipes compared on parts of the training images, and the best judged on the rest.

recipes     what is compared: options of `protoprune select`, applied to parts of a set
halving     the better half of them goes on, from split to split of the images that choose
judging     the winner on images that chose nothing, against random lists
running     the two joined, for a feature file; `--keep auto`
unlabelled  what can be said without labels
knn         how well features tell the classes apart
report      tables, figure, sentence
"""
