package rest

import (
	"net/http"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/notify"
)

func channelID(text string) (uuid.UUID, error) { return parseID(id.Channel, "channel", text) }

// channel converts a row for the API.
func channel(row db.Channel) rest.Channel {
	return rest.Channel{
		ID: id.Format(id.Channel, row.ID), TeamID: id.Format(id.Team, row.TeamID), Name: row.Name, Kind: rest.ChannelKind(row.Kind), Events: channelEvents(row.Events),
		Target: row.Target, Enabled: row.Enabled, Confirmed: notify.Confirmed(row), DisabledReason: some(row.DisabledReason), FailingSince: utc(row.FailingSince), CreatedAt: row.CreatedAt.UTC(),
	}
}

func channelEvents(names []string) rest.ChannelEvents {
	events := make(rest.ChannelEvents, len(names))
	for i, name := range names {
		events[i] = rest.ChannelEvent(name)
	}
	return events
}

func eventNames(events *rest.ChannelEvents) []string {
	var names []string
	for _, e := range or(events, nil) {
		names = append(names, string(e))
	}
	return names
}

// delivery converts a row for the API.
func delivery(row db.Delivery) rest.ChannelDelivery {
	d := rest.ChannelDelivery{
		ID: row.ID, Event: row.Event, State: rest.ChannelDeliveryState(row.State), CreatedAt: row.CreatedAt.UTC(), Attempts: row.Attempts, TriedAt: utc(row.TriedAt),
		Status: row.Status, TookMs: row.TookMs, Error: some(row.Error),
	}
	if row.State == "pending" {
		d.NextAt = utc(&row.NextAt)
	}
	return d
}

// ListChannels answers GET /v1/channels.
func (a *API) ListChannels(w http.ResponseWriter, r *http.Request) {
	rows, err := a.Channels.List(r.Context(), caller(r).Team)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	list := rest.ChannelList{Channels: make([]rest.Channel, len(rows))}
	for i, row := range rows {
		list.Channels[i] = channel(row)
	}
	answer(w, http.StatusOK, list)
}

// CreateChannel answers POST /v1/channels.
func (a *API) CreateChannel(w http.ResponseWriter, r *http.Request) {
	var req rest.CreateChannel
	err := decode(r, &req)
	var row db.Channel
	if err == nil {
		row, err = a.Channels.Create(r.Context(), caller(r).Team, caller(r).Platform, notify.Params{
			Kind: string(req.Kind), Name: &req.Name, Events: eventNames(&req.Events), URL: req.URL, Secret: req.Secret, Address: req.Address,
		})
	}
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	c := channel(row)
	w.Header().Set("Location", "/v1/channels/"+c.ID)
	answer(w, http.StatusCreated, c)
}

// GetChannel answers GET /v1/channels/{channel_id}.
func (a *API) GetChannel(w http.ResponseWriter, r *http.Request, text rest.ChannelID) {
	u, err := channelID(text)
	var row db.Channel
	if err == nil {
		row, err = a.Channels.Get(r.Context(), caller(r).Team, u)
	}
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, channel(row))
}

// ChangeChannel answers PATCH /v1/channels/{channel_id}.
func (a *API) ChangeChannel(w http.ResponseWriter, r *http.Request, text rest.ChannelID) {
	var req rest.ChangeChannel
	u, err := channelID(text)
	if err == nil {
		err = decode(r, &req)
	}
	var row db.Channel
	if err == nil {
		row, err = a.Channels.Update(r.Context(), caller(r).Team, u, caller(r).Platform, notify.Params{
			Name: req.Name, Events: eventNames(req.Events), URL: req.URL, Secret: req.Secret, Address: req.Address, Enabled: req.Enabled,
		})
	}
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, channel(row))
}

// DeleteChannel answers DELETE /v1/channels/{channel_id}.
func (a *API) DeleteChannel(w http.ResponseWriter, r *http.Request, text rest.ChannelID) {
	u, err := channelID(text)
	if err == nil {
		err = a.Channels.Delete(r.Context(), caller(r).Team, u)
	}
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// TestChannel answers POST /v1/channels/{channel_id}/test.
func (a *API) TestChannel(w http.ResponseWriter, r *http.Request, text rest.ChannelID) {
	u, err := channelID(text)
	var row db.Delivery
	if err == nil {
		row, err = a.Channels.Test(r.Context(), caller(r).Team, u)
	}
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, delivery(row))
}

// AskConfirmation answers POST /v1/channels/{channel_id}/confirmation.
func (a *API) AskConfirmation(w http.ResponseWriter, r *http.Request, text rest.ChannelID) {
	u, err := channelID(text)
	if err == nil {
		err = a.Channels.AskConfirmation(r.Context(), caller(r).Team, u)
	}
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusAccepted)
}

// ConfirmChannel answers POST /v1/channel-confirmations.
func (a *API) ConfirmChannel(w http.ResponseWriter, r *http.Request) {
	var req rest.ConfirmChannel
	err := decode(r, &req)
	if err == nil {
		err = a.Channels.Confirm(r.Context(), req.Token)
	}
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// ListDeliveries answers GET /v1/channels/{channel_id}/deliveries.
func (a *API) ListDeliveries(w http.ResponseWriter, r *http.Request, text rest.ChannelID, params rest.ListDeliveriesParams) {
	u, err := channelID(text)
	var rows []db.Delivery
	var next string
	if err == nil {
		rows, next, err = a.Channels.Deliveries(r.Context(), caller(r).Team, u, or(params.Cursor, ""), or(params.Limit, defaultLimit))
	}
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	list := rest.ChannelDeliveryList{Deliveries: make([]rest.ChannelDelivery, len(rows)), NextCursor: some(next)}
	for i, row := range rows {
		list.Deliveries[i] = delivery(row)
	}
	answer(w, http.StatusOK, list)
}
