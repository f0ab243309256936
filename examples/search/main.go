// Command search searches for the moves that win a game whose state is in the memory of a
// process. Each round forks the sandbox, makes a different move in each copy, and
// continues with the best one.
package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net/http"
	"os"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/wrenn-dev/wrenn/client"
)

//go:embed worker.py
var worker string

var moves = []string{"increment", "double", "triple"}

// position is the worker's response.
type position struct {
	Number   int      `json:"number"`
	Played   []string `json:"played"`
	Distance int      `json:"distance"`
}

func main() {
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) (err error) {
	c, err := client.New(os.Getenv("WRENN_URL"), os.Getenv("WRENN_API_KEY"))
	if err != nil {
		return err
	}
	box, err := c.Create(ctx, client.CreateOptions{Metadata: map[string]string{"example": "search"}})
	if err != nil {
		return err
	}
	alive := []client.Sandbox{*box}
	defer func() {
		for _, s := range alive {
			err = errors.Join(err, c.Delete(ctx, s.ID))
		}
	}()
	if _, err := c.WriteFile(ctx, box.ID, "/home/user/worker.py", "", strings.NewReader(worker)); err != nil {
		return err
	}
	result, err := c.Exec(ctx, box.ID, client.Command{Shell: true, Cmd: `
		nohup python3 worker.py >/dev/null 2>&1 &
		curl -fs --retry 100 --retry-delay 1 --retry-all-errors http://localhost:8000/`}, nil)
	if err != nil {
		return err
	}
	if result.ExitCode != 0 {
		return fmt.Errorf("the worker does not start: exit code %d: %s", result.ExitCode, result.Stderr)
	}

	for round := 1; round <= 5; round++ {
		copies, err := c.Fork(ctx, alive[0].ID, len(moves)-1)
		if err != nil {
			return err
		}
		alive = append(alive, copies...)
		reached := make([]position, len(moves))
		var all errgroup.Group
		for i, move := range moves {
			all.Go(func() (err error) {
				reached[i], err = play(ctx, c, &alive[i], move)
				return err
			})
		}
		if err := all.Wait(); err != nil {
			return err
		}
		best := 0
		for i, p := range reached {
			if p.Distance < reached[best].Distance {
				best = i
			}
		}
		alive[0], alive[best] = alive[best], alive[0]
		for len(alive) > 1 {
			if err := c.Delete(ctx, alive[len(alive)-1].ID); err != nil {
				return err
			}
			alive = alive[:len(alive)-1]
		}
		fmt.Printf("round %d: %d by %s\n", round, reached[best].Number, strings.Join(reached[best].Played, ", "))
		if reached[best].Distance == 0 {
			return nil
		}
	}
	return errors.New("found no way in 5 rounds")
}

// play makes a move in one sandbox.
func play(ctx context.Context, c *client.Client, s *client.Sandbox, move string) (p position, err error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, c.URL(s, 8000)+"play?move="+move, nil)
	if err != nil {
		return p, err
	}
	answer, err := (&http.Client{Transport: c.Transport()}).Do(r)
	if err != nil {
		return p, err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return p, fmt.Errorf("%s in %s: %s", move, s.ID, answer.Status)
	}
	return p, json.NewDecoder(answer.Body).Decode(&p)
}
