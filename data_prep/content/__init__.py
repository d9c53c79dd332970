"""What images show, as a frozen backbone sees it: how well it tells the classes apart, and matching by it."""
