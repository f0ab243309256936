package sandboxes

import (
	"time"

	"github.com/wrenn-dev/wrenn/internal/condition"
	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/text"
)

// A host can be hostile or have a wrong clock, so its reports are clamped to what the
// database knows.

const (
	// clockSkew is how far a host's clock may be ahead of the server's.
	clockSkew = 10 * time.Minute
	// maxDiskMiB is the largest disk that a sandbox may have.
	maxDiskMiB = 262144
)

// Expiry returns when the host will end or pause a sandbox (nil: never). The result is at
// most the sandbox's timeout plus clockSkew after now.
func Expiry(row db.Sandbox, has *hostagentv1.Sandbox, now time.Time) *time.Time {
	if has.GetExpiresAt() == nil || row.TimeoutSeconds == 0 {
		return nil
	}
	latest := now.Add(time.Duration(row.TimeoutSeconds)*time.Second + clockSkew)
	at := between(has.GetExpiresAt().AsTime(), row.CreatedAt, latest).Truncate(time.Microsecond)
	return &at
}

// pausedAt returns since when a sandbox is paused. Only the host knows, because it may
// have paused it while no server ran.
func pausedAt(row db.Sandbox, has *hostagentv1.Sandbox) time.Time {
	now := store.Now()
	if has.GetPausedAt() == nil {
		return now
	}
	earliest := row.CreatedAt
	if row.StartedAt != nil {
		earliest = *row.StartedAt
	}
	return between(has.GetPausedAt().AsTime(), earliest, now)
}

// maxDetail bounds the detail of a condition, in bytes.
const maxDetail = 1 << 10

// conditionOf returns the condition that a host reports for a sandbox; zero if there is
// none or this release does not know it.
func conditionOf(row db.Sandbox, has *hostagentv1.Sandbox) condition.Condition {
	c := has.GetCondition()
	reason := condition.Reason(c.GetReason())
	if reason.Kind() == "" {
		return condition.Condition{}
	}
	since := between(c.GetSince().AsTime(), row.CreatedAt, store.Now()).Truncate(time.Microsecond)
	return condition.Condition{Reason: reason, Detail: text.Clean(c.GetDetail(), maxDetail), Since: since}
}

// Silence returns the condition of an unresponsive guest that the host reports for a
// running sandbox (zero: the guest responds), and whether the row has another one.
func Silence(row db.Sandbox, has *hostagentv1.Sandbox) (c condition.Condition, news bool) {
	if c = conditionOf(row, has); c.Reason.Kind() != condition.Unresponsive {
		c = condition.Condition{}
	}
	return c, row.ConditionReason != string(c.Reason)
}

// ConditionOf returns the condition in a row; zero: none.
func ConditionOf(row db.Sandbox) condition.Condition {
	if row.Condition == "" || row.ConditionSince == nil || State(row.State).Ended() {
		return condition.Condition{}
	}
	return condition.Condition{Reason: condition.Reason(row.ConditionReason), Detail: row.ConditionDetail, Since: *row.ConditionSince}
}

// disk returns the size of a sandbox's disk in MiB. If the request named none, the host
// chose it.
func disk(row db.Sandbox, has *hostagentv1.Sandbox) int32 {
	if row.DiskMiB > 0 {
		return row.DiskMiB
	}
	return min(max(has.GetDiskMib(), 0), maxDiskMiB)
}

// between clamps at to earliest and latest. latest wins if it is before earliest.
func between(at, earliest, latest time.Time) time.Time {
	if at.Before(earliest) {
		at = earliest
	}
	if at.After(latest) {
		at = latest
	}
	return at
}
