package server

import "github.com/wrenn-dev/wrenn/internal/server/budget"

// Memory is the memory for requests of s.
func Memory(s *Server) *budget.Budget { return s.memory }

// Acquired returns how many of the database's connections s uses at this moment.
func Acquired(s *Server) int { return s.store.Acquired() }
