package up

import (
	"reflect"
	"slices"
	"testing"

	hostagent "github.com/wrenn-dev/wrenn/internal/agent"
	controlplane "github.com/wrenn-dev/wrenn/internal/server"
)

// Every setting of the programs that `wrenn up` starts reaches them.
func TestSettingsArePassed(t *testing.T) {
	for _, name := range []string{"WRENN_OVERCOMMIT_MEMORY", "WRENN_HEARTBEAT", "WRENN_DRAIN_IDLE", "WRENN_TRUSTED_PROXIES", "WRENN_REQUEST_MEMORY_MIB", "WRENN_BUILD_WORKERS", "WRENN_WARM", "WRENN_DNS", "WRENN_NET_PACKETS_PER_SECOND"} {
		t.Setenv(name, "of "+name)
	}
	t.Setenv("WRENN_NO_SETTING", "x")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "x")
	server, err := passed(&controlplane.Config{})
	if err != nil {
		t.Fatal(err)
	}
	agent, err := passed(&hostagent.Config{})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(server)
	slices.Sort(agent)
	if want := []string{
		"WRENN_BUILD_WORKERS=of WRENN_BUILD_WORKERS", "WRENN_DRAIN_IDLE=of WRENN_DRAIN_IDLE", "WRENN_HEARTBEAT=of WRENN_HEARTBEAT",
		"WRENN_OVERCOMMIT_MEMORY=of WRENN_OVERCOMMIT_MEMORY", "WRENN_REQUEST_MEMORY_MIB=of WRENN_REQUEST_MEMORY_MIB",
		"WRENN_TRUSTED_PROXIES=of WRENN_TRUSTED_PROXIES",
	}; !reflect.DeepEqual(server, want) {
		t.Errorf("the server is passed %q, want %q", server, want)
	}
	if want := []string{"WRENN_DNS=of WRENN_DNS", "WRENN_NET_PACKETS_PER_SECOND=of WRENN_NET_PACKETS_PER_SECOND", "WRENN_WARM=of WRENN_WARM"}; !reflect.DeepEqual(agent, want) {
		t.Errorf("the agent is passed %q, want %q", agent, want)
	}
}
