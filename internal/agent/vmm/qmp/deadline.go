package qmp

import "time"

// deadlinePast is a deadline that makes every read and write fail at once.
var deadlinePast = time.Unix(1, 0)
