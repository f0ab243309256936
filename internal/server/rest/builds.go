package rest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/builds"
	"github.com/wrenn-dev/wrenn/internal/server/spool"
)

func buildID(s string) (uuid.UUID, error) { return parseID(id.Build, "build", s) }

// buildOf converts a row for the API.
func buildOf(row db.Build) rest.Build {
	b := rest.Build{
		ID: id.Format(id.Build, row.ID), TeamID: id.Format(id.Team, row.TeamID), Name: row.Name, Tags: append([]string{}, row.Tags...),
		State: rest.BuildState(row.State), Error: some(row.Error), TotalSteps: row.TotalSteps, DoneSteps: row.DoneSteps, Attempts: some(row.Attempts),
		Version: row.Version, CreatedAt: row.CreatedAt.UTC(), StartedAt: row.StartedAt, EndedAt: row.EndedAt,
	}
	if row.TemplateID != nil {
		b.TemplateID = some(id.Format(id.Template, *row.TemplateID))
	}
	return b
}

func stepOf(s builds.Step) rest.BuildStep {
	return rest.BuildStep{
		Number: int32(s.Number), Phase: rest.BuildStepPhase(s.Phase), Text: s.Text, State: rest.BuildStepState(s.State), Output: s.Output,
		Truncated: some(s.Truncated), Tail: some(s.Tail), ExitCode: s.ExitCode, Error: some(s.Error), StartedAt: s.StartedAt, DurationMs: some(s.DurationMS),
	}
}

// CreateBuild answers POST /v1/templates/builds.
func (a *API) CreateBuild(w http.ResponseWriter, r *http.Request) {
	a.createBuild(w, r, caller(r).Team, "/v1/templates/builds/")
}

// CreateBuildAdmin answers POST /v1/admin/builds.
func (a *API) CreateBuildAdmin(w http.ResponseWriter, r *http.Request) {
	a.createBuild(w, r, uuid.Nil, "/v1/admin/builds/")
}

// createBuild starts a build. Its Location is below at.
func (a *API) createBuild(w http.ResponseWriter, r *http.Request, team uuid.UUID, at string) {
	var req rest.CreateBuild
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	var registry *builds.Registry
	if req.Registry != nil {
		registry = &builds.Registry{Username: req.Registry.Username, Password: req.Registry.Password}
	}
	row, err := a.Builds.Start(r.Context(), team, builds.Request{
		Name: req.Name, Tags: or(req.Tags, nil), Recipe: req.Recipe, Archive: or(req.Archive, ""), Registry: registry,
		Options: builds.Options{
			VCPUs: or(req.Vcpus, 0), MemoryMiB: or(req.MemoryMib, 0), DiskMiB: or(req.DiskMib, 0),
			NoCache: or(req.NoCache, false), SkipPrePost: or(req.SkipPrePost, false),
			StepTimeout: or(req.StepTimeoutSeconds, 0), PhaseTimeout: or(req.PhaseTimeoutSeconds, 0),
		},
	})
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	b := buildOf(row)
	w.Header().Set("Location", at+b.ID)
	answer(w, http.StatusAccepted, b)
}

// ListBuilds answers GET /v1/templates/builds.
func (a *API) ListBuilds(w http.ResponseWriter, r *http.Request, params rest.ListBuildsParams) {
	a.listBuilds(w, r, caller(r).Team, or(params.Cursor, ""), or(params.Limit, defaultLimit))
}

// ListBuildsAdmin answers GET /v1/admin/builds.
func (a *API) ListBuildsAdmin(w http.ResponseWriter, r *http.Request, params rest.ListBuildsAdminParams) {
	a.listBuilds(w, r, uuid.Nil, or(params.Cursor, ""), or(params.Limit, defaultLimit))
}

func (a *API) listBuilds(w http.ResponseWriter, r *http.Request, team uuid.UUID, cursor string, limit int) {
	rows, next, err := a.Builds.List(r.Context(), team, cursor, limit)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	list := make([]rest.Build, len(rows))
	for i, row := range rows {
		list[i] = buildOf(row)
	}
	answer(w, http.StatusOK, rest.BuildList{Builds: list, NextCursor: some(next)})
}

// PutBuildArchive answers PUT /v1/templates/builds/archives/{digest}.
func (a *API) PutBuildArchive(w http.ResponseWriter, r *http.Request, digest rest.ArchiveDigest) {
	a.putArchive(w, r, caller(r).Team, digest)
}

// PutBuildArchiveAdmin answers PUT /v1/admin/builds/archives/{digest}.
func (a *API) PutBuildArchiveAdmin(w http.ResponseWriter, r *http.Request, digest rest.ArchiveDigest) {
	a.putArchive(w, r, uuid.Nil, digest)
}

func (a *API) putArchive(w http.ResponseWriter, r *http.Request, team uuid.UUID, digest string) {
	if err := a.Builds.PutArchive(r.Context(), team, digest, spool.Body{Reader: r.Body, Length: r.ContentLength}); err != nil {
		a.Fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// GetBuild answers GET /v1/templates/builds/{build_id}.
func (a *API) GetBuild(w http.ResponseWriter, r *http.Request, build rest.BuildID) {
	a.answerBuild(w, r, caller(r).Team, build, a.Builds.Get)
}

// GetBuildAdmin answers GET /v1/admin/builds/{build_id}.
func (a *API) GetBuildAdmin(w http.ResponseWriter, r *http.Request, build rest.BuildID) {
	a.answerBuild(w, r, uuid.Nil, build, a.Builds.Get)
}

// CancelBuild answers POST /v1/templates/builds/{build_id}/cancel.
func (a *API) CancelBuild(w http.ResponseWriter, r *http.Request, build rest.BuildID) {
	a.answerBuild(w, r, caller(r).Team, build, a.Builds.Cancel)
}

// CancelBuildAdmin answers POST /v1/admin/builds/{build_id}/cancel.
func (a *API) CancelBuildAdmin(w http.ResponseWriter, r *http.Request, build rest.BuildID) {
	a.answerBuild(w, r, uuid.Nil, build, a.Builds.Cancel)
}

// answerBuild responds with the build that find returns, and its steps.
func (a *API) answerBuild(w http.ResponseWriter, r *http.Request, team uuid.UUID, build string, find func(context.Context, uuid.UUID, uuid.UUID) (db.Build, error)) {
	u, err := buildID(build)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	row, err := find(r.Context(), team, u)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	steps, err := a.Builds.Steps(r.Context(), u)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, withSteps(row, steps))
}

func withSteps(row db.Build, steps []builds.Step) rest.Build {
	b := buildOf(row)
	list := make([]rest.BuildStep, len(steps))
	for i, s := range steps {
		list[i] = stepOf(s)
	}
	b.Steps, b.Recipe = &list, &row.Recipe
	return b
}

// FollowBuild answers GET /v1/templates/builds/{build_id}/logs.
func (a *API) FollowBuild(w http.ResponseWriter, r *http.Request, build rest.BuildID) {
	a.followBuild(w, r, caller(r).Team, build)
}

// FollowBuildAdmin answers GET /v1/admin/builds/{build_id}/logs.
func (a *API) FollowBuildAdmin(w http.ResponseWriter, r *http.Request, build rest.BuildID) {
	a.followBuild(w, r, uuid.Nil, build)
}

// errHead ends a stream after the header, for HEAD.
var errHead = errors.New("HEAD")

func (a *API) followBuild(w http.ResponseWriter, r *http.Request, team uuid.UUID, build string) {
	u, err := buildID(build)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	begun := false
	say := func(e rest.BuildEvent) error {
		b, err := json.Marshal(e)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(w, "data: %s\n\n", b)
		return err
	}
	sent := map[int]*sentStep{} // what the client has of each step
	held := observed(r).held
	err = a.Builds.Follow(r.Context(), team, u, func(row db.Build, steps []builds.Step) error {
		defer held.Release() // the rows that Follow has read for this call
		if !begun {
			w.Header().Set("Content-Type", "text/event-stream")
			w.Header().Set("Cache-Control", "no-store")
			w.WriteHeader(http.StatusOK)
			begun = true
		}
		if r.Method == http.MethodHead {
			return errHead
		}
		for _, s := range steps {
			if err := sendStep(sent, s, say); err != nil {
				return err
			}
		}
		if builds.State(row.State).Ended() {
			b := buildOf(row)
			if err := say(rest.BuildEvent{Type: rest.End, Build: &b}); err != nil {
				return err
			}
		}
		return http.NewResponseController(w).Flush()
	})
	if err != nil && !begun {
		a.Fail(w, r, err)
		return
	}
	if err != nil && !errors.Is(err, errHead) && r.Context().Err() == nil {
		a.log(r).Debug("follow build", "error", err)
	}
}

// sentStep is what a client has of a step: its state, and how many bytes of its output.
type sentStep struct {
	state  string
	output int
}

// sendStep sends the news of a step to the client.
func sendStep(sent map[int]*sentStep, s builds.Step, say func(rest.BuildEvent) error) error {
	before := sent[s.Number]
	if before == nil || len(s.Output) < before.output { // the first time, or after a new attempt
		before = &sentStep{state: "pending"}
		sent[s.Number] = before
	}
	event := func() error {
		before.state = s.State
		bare := stepOf(s)
		bare.Output, bare.Tail = "", nil
		return say(rest.BuildEvent{Type: rest.Step, Step: &bare})
	}
	output := func(data string) error {
		if data == "" {
			return nil
		}
		return say(rest.BuildEvent{Type: rest.Output, Number: some(int32(s.Number)), Data: &data})
	}
	if s.State != before.state && s.State == "running" {
		if err := event(); err != nil {
			return err
		}
	}
	if err := output(s.Output[before.output:]); err != nil {
		return err
	}
	before.output = len(s.Output)
	if s.State == before.state {
		return nil
	}
	if s.Truncated {
		if err := output("\n[…]\n" + s.Tail); err != nil {
			return err
		}
	}
	return event()
}
