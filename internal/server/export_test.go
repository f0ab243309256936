package server

import "github.com/wrenn-dev/wrenn/internal/server/budget"

// Memory returns the budget of memory for requests.
func Memory(s *Server) *budget.Budget { return s.memory }

// Acquired returns how many database connections s uses now.
func Acquired(s *Server) int { return s.store.Acquired() }
