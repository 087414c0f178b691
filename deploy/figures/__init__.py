"""The pictures of finished runs: ``fedbags figures``, and the end of ``fedbags simulate``.

curves.png              training loss, and held-back bags, round by round
confusion-LEVEL.png     pooled test images, a matrix per level
tsne.png                test images and bags of them on a plane
activation.png          where the model finds the leaf that it predicts

draw.py draws them all; style.py is how every picture of this project looks. matplotlib and scikit-learn are
imported below here only (and where style.py is used), so nothing else waits for them.
"""
