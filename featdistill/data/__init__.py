"""From manifest rows to uint8 batches (paper, sections 4.1 and 4.6).

`preprocessing` fits an image to a backbone (4.1), `train_dataset` and `loading` make batches, `views` adds
test-time views, `amplitude_mixup` is the augmentation of 4.6, `sampling` orders and balances rows, and
`image_cache` stores decoded images.
"""
