package server

// Acquired returns how many of the database's connections s uses at this moment.
func Acquired(s *Server) int { return s.store.Acquired() }
