package agent_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/image/oci/ocitest"
	"github.com/wrenn-dev/wrenn/internal/agent/image/oci/ocitest/listing"
	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// importImage imports a template on the host. It sends the archive after start, if there
// is one.
func (h *host) importImage(ctx context.Context, start *pb.ImportTemplateRequest_Start, archive []byte) (*pb.ImportTemplateResponse, error) {
	s := h.ImportTemplate(ctx)
	err := s.Send(&pb.ImportTemplateRequest{Message: &pb.ImportTemplateRequest_Start_{Start: start}})
	for err == nil && len(archive) > 0 {
		n := min(len(archive), 100_000)
		err = s.Send(&pb.ImportTemplateRequest{Message: &pb.ImportTemplateRequest_Chunk{Chunk: archive[:n]}})
		archive = archive[n:]
	}
	res, err := s.CloseAndReceive()
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

// templates lists the folders of templates other than minimal.
func (h *host) templates(t *testing.T) (names []string) {
	t.Helper()
	err := filepath.WalkDir(h.Dir.Images(), func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "template.json" && !strings.Contains(p, uuid.Nil.String()) || strings.HasPrefix(filepath.Base(p), ".tmp-") {
			names = append(names, p)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func gzipped(t *testing.T, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// listProgram returns a layer entry with the program that lists a guest's files.
func listProgram(t *testing.T) ocitest.Entry {
	t.Helper()
	mod, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "list")
	cmd := exec.Command("go", "build", "-ldflags", "-s -w", "-o", file, "./internal/agent/image/oci/ocitest/list")
	cmd.Dir, cmd.Env = strings.TrimSpace(string(mod)), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	program, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return ocitest.File("list", string(program)).With(func(h *tar.Header) { h.Mode = 0o755 })
}

// TestImport imports an image with every feature that layers can have, from a registry
// that asks for a password and from archives. In a sandbox of it, every file is as umoci
// unpacks it, and the image's own command runs as configured.
func TestImport(t *testing.T) {
	for _, tool := range []string{"umoci", "skopeo"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s for the expected result", tool)
		}
	}
	// Not shared, because the test kills the agent and counts templates.
	h := newOwnHost(t, func(h *host) { h.Env["WRENN_LOCAL_REGISTRIES"] = "1" })
	var layers [][]byte
	for _, entries := range append(ocitest.Variety(), []ocitest.Entry{listProgram(t)}) {
		layers = append(layers, ocitest.Archive(t, entries))
	}
	img := ocitest.Build(t, layers...)
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	file.Config.Entrypoint, file.Config.Cmd = []string{"/list"}, []string{"serve"}
	if img, err = mutate.ConfigFile(img, file); err != nil {
		t.Fatal(err)
	}
	const password = "s3cret-of-the-registry"
	ref, err := name.ParseReference(ocitest.Registry(t, "reader", password) + "/team/variety:v1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img, remote.WithAuth(&authn.Basic{Username: "reader", Password: password}), remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
	team := id.Format(id.Team, uuid.New())
	start := func() *pb.ImportTemplateRequest_Start {
		return &pb.ImportTemplateRequest_Start{TemplateId: id.Format(id.Template, uuid.New()), TeamId: team, Name: "variety", DiskMib: 256}
	}
	registry := func(reference, password string) *pb.ImportTemplateRequest_Start {
		s := start()
		s.Source = &pb.ImportTemplateRequest_Start_Registry{Registry: &pb.ImportTemplateRequest_Registry{Reference: reference, Username: "reader", Password: password}}
		return s
	}
	archive := func(tag string) *pb.ImportTemplateRequest_Start {
		s := start()
		s.Source = &pb.ImportTemplateRequest_Start_Archive{Archive: &pb.ImportTemplateRequest_Archive{Tag: tag}}
		return s
	}
	work := t.TempDir()
	skopeo := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("skopeo", append([]string{"--insecure-policy", "copy"}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("skopeo: %v: %s", err, out)
		}
	}
	skopeo("--src-tls-verify=false", "--src-creds", "reader:"+password, "docker://"+ref.String(), "oci:"+work+"/layout:v1")
	skopeo("oci:"+work+"/layout:v1", "docker-archive:"+work+"/saved.tar:team/variety:v1")
	skopeo("oci:"+work+"/layout:v1", "oci-archive:"+work+"/packed.tar:v1")
	saved, packed := []byte(read(work+"/saved.tar")), []byte(read(work+"/packed.tar"))

	t.Run("refused", func(t *testing.T) {
		small := archive("")
		small.DiskMib = 8
		nobody := registry(ref.String(), password)
		nobody.GetRegistry().Username = ""
		for what, c := range map[string]struct {
			start   *pb.ImportTemplateRequest_Start
			archive []byte
			want    connect.Code
		}{
			"a wrong password":         {registry(ref.String(), "wrong"), nil, connect.CodePermissionDenied},
			"a password of nobody":     {nobody, nil, connect.CodeInvalidArgument},
			"no such image":            {registry(ref.Context().Name()+":none", password), nil, connect.CodeNotFound},
			"no reference":             {registry("Not//A Reference", password), nil, connect.CodeInvalidArgument},
			"a link-local registry":    {registry("169.254.169.254/x/y", password), nil, connect.CodeUnavailable},
			"no source":                {start(), nil, connect.CodeInvalidArgument},
			"no archive":               {archive(""), []byte("no archive, but some text"), connect.CodeInvalidArgument},
			"an empty archive":         {archive(""), nil, connect.CodeInvalidArgument},
			"half an archive":          {archive(""), packed[:len(packed)/2], connect.CodeInvalidArgument},
			"half a compressed one":    {archive(""), gzipped(t, packed)[:1000], connect.CodeInvalidArgument},
			"an archive without a tag": {archive("v2"), packed, connect.CodeInvalidArgument},
			"a disk that is too small": {small, packed[:], connect.CodeInvalidArgument},
		} {
			res, err := h.importImage(t.Context(), c.start, c.archive)
			if connect.CodeOf(err) != c.want {
				t.Errorf("%s: %v, %v, not %v", what, res, err, c.want)
			} else if strings.Contains(err.Error(), password) {
				t.Errorf("%s: the error has the password: %v", what, err)
			}
		}
		if left := h.templates(t); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
	t.Run("resolved", func(t *testing.T) {
		resolve := func(s *pb.ImportTemplateRequest_Start) (string, error) {
			res, err := h.ResolveImage(t.Context(), connect.NewRequest(&pb.ResolveImageRequest{Registry: s.GetRegistry()}))
			if err != nil {
				return "", err
			}
			return res.Msg.GetPinned(), nil
		}
		sum, err := img.Digest()
		if err != nil {
			t.Fatal(err)
		}
		pinned, err := resolve(registry(ref.String(), password))
		if err != nil || pinned != ref.Context().Name()+"@"+sum.String() {
			t.Errorf("%q, %v", pinned, err)
		}
		if again, err := resolve(registry(pinned, password)); again != pinned {
			t.Errorf("%q means %q, %v", pinned, again, err)
		}
		for want, s := range map[connect.Code]*pb.ImportTemplateRequest_Start{
			connect.CodePermissionDenied: registry(pinned, "wrong"),
			connect.CodeNotFound:         registry(ref.Context().Name()+":none", password),
			connect.CodeInvalidArgument:  start(),
			connect.CodeUnavailable:      registry("169.254.169.254/x/y", password),
		} {
			if _, err := resolve(s); connect.CodeOf(err) != want || strings.Contains(err.Error(), password) {
				t.Errorf("%v: %v", want, err)
			}
		}
	})
	t.Run("removed during the import", func(t *testing.T) {
		a := archive("")
		s := h.ImportTemplate(t.Context())
		if err := s.Send(&pb.ImportTemplateRequest{Message: &pb.ImportTemplateRequest_Start_{Start: a}}); err != nil {
			t.Fatal(err)
		}
		h.await(t, func() bool { return len(h.templates(t)) > 0 })
		if _, err := h.DeleteTemplate(t.Context(), connect.NewRequest(&pb.DeleteTemplateRequest{TeamId: team, TemplateId: a.TemplateId})); err != nil && connect.CodeOf(err) != connect.CodeNotFound {
			t.Error(err)
		}
		if left := h.templates(t); len(left) > 0 { // removed at once
			t.Errorf("left: %v", left)
		}
		if _, err := s.CloseAndReceive(); connect.CodeOf(err) != connect.CodeAborted {
			t.Errorf("the import: %v", err)
		}
	})
	t.Run("the caller disconnects", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		s := h.ImportTemplate(ctx)
		if err := s.Send(&pb.ImportTemplateRequest{Message: &pb.ImportTemplateRequest_Start_{Start: archive("")}}); err != nil {
			t.Fatal(err)
		}
		h.await(t, func() bool { return len(h.templates(t)) > 0 })
		cancel()
		h.await(t, func() bool { return len(h.templates(t)) == 0 })
	})
	t.Run("killed", func(t *testing.T) {
		s := h.ImportTemplate(t.Context())
		if err := s.Send(&pb.ImportTemplateRequest{Message: &pb.ImportTemplateRequest_Start_{Start: archive("")}}); err != nil {
			t.Fatal(err)
		}
		h.await(t, func() bool { return len(h.templates(t)) > 0 })
		h.Kill(t, syscall.SIGKILL)
		h.Start(t)
		if left := h.templates(t); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})

	want, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	fromRegistry := registry(ref.String(), password)
	fromRegistry.Vcpus, fromRegistry.MemoryMib = 1, 256
	for what, c := range map[string]struct {
		start   *pb.ImportTemplateRequest_Start
		archive []byte
	}{
		"registry":         {fromRegistry, nil},
		"docker save":      {archive("team/variety:v1"), gzipped(t, saved)},
		"OCI image layout": {archive(""), packed},
	} {
		begin := time.Now()
		res, err := h.importImage(t.Context(), c.start, c.archive)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		t.Logf("%s: imported in %v", what, time.Since(begin).Round(time.Millisecond))
		// skopeo may rewrite the configuration.
		if what == "registry" && res.GetDigest() != want.String() {
			t.Errorf("%s: %v", what, res)
		}
		d := res.GetTemplate().GetDefaults()
		if d.GetUser() != "1000:100" || d.GetWorkdir() != "/srv" || d.GetEnvs()["B"] != "2=3" {
			t.Errorf("%s: defaults %v", what, d)
		}
		again, err := h.importImage(t.Context(), c.start, nil)
		if err != nil || !again.GetTemplate().GetCreatedAt().AsTime().Equal(res.GetTemplate().GetCreatedAt().AsTime()) {
			t.Errorf("%s: again: %v, %v", what, again, err)
		}
	}
	if n := len(h.templates(t)); n != 3 {
		t.Errorf("%d templates", n)
	}
	noSecret(t, string(h.Dir), password)

	r := request()
	r.TeamId, r.TemplateId, r.Envs = team, fromRegistry.TemplateId, map[string]string{"A": "the sandbox's"}
	sandbox := h.create(t, r)
	got := h.exec(t, sandbox, &pb.Command{Cmd: "/list", User: "root", Cwd: "/"}, nil)
	if got.GetExitCode() != 0 {
		t.Fatalf("list: %s", got.GetStderr())
	}
	bundle := filepath.Join(work, "bundle")
	if out, err := exec.Command("umoci", "unpack", "--image", work+"/layout:v1", bundle).CombinedOutput(); err != nil {
		t.Fatalf("umoci: %v: %s", err, out)
	}
	reference, err := listing.Of(filepath.Join(bundle, "rootfs"))
	if err != nil {
		t.Fatal(err)
	}
	compareTrees(t, strings.Split(strings.TrimSuffix(string(got.GetStdout()), "\n"), "\n"), reference)

	runs := func(sandbox string) string {
		t.Helper()
		code, body := h.get(t, h.url(sandbox, 8000, "/"), nil)
		if code != 200 || !strings.HasSuffix(body, " user 1000:100 in /srv B=2=3\n") {
			t.Errorf("the image's command says %d %q", code, body)
		}
		return body
	}
	before := runs(sandbox)
	h.pause(t, sandbox)
	h.resume(t, sandbox)
	if after := runs(sandbox); after != before {
		t.Errorf("after a pause it is %q, not %q", after, before)
	}
	// Processes get the image's defaults, and the sandbox's environment takes precedence.
	got = h.exec(t, sandbox, &pb.Command{Cmd: "/list", Args: []string{"serve"}, TimeoutSeconds: 1}, nil)
	if !strings.Contains(string(got.GetStderr()), "address already in use") {
		t.Errorf("a second server: %v", got)
	}
	tpl := h.snapshot(t, sandbox, "again")
	if d := tpl.GetDefaults(); d.GetUser() != "1000:100" || d.GetEnvs()["A"] != "4" {
		t.Errorf("a snapshot's defaults: %v", d)
	}
}

var linkCount = regexp.MustCompile(` links [0-9]+`)

// compareTrees compares a guest's files with the reference. Where the reference has
// nothing, the guest may have what Wrenn adds.
func compareTrees(t *testing.T, guest, reference []string) {
	t.Helper()
	byName := func(lines []string) map[string]string {
		m := map[string]string{}
		for _, l := range lines {
			name, rest, _ := strings.Cut(l[1:], `" `)
			if name == "run" || strings.HasPrefix(name, "run/") { // a mount point
				continue
			}
			// mke2fs makes a symbolic link with several names into separate links.
			if strings.HasPrefix(rest, "mode 120777 ") {
				rest = linkCount.ReplaceAllString(rest, "")
			}
			m[name] = rest
		}
		return m
	}
	added := strings.Fields("lost+found sbin sbin/wrenn-init usr/local usr/local/bin usr/local/bin/envd etc/hostname etc/hosts etc/machine-id etc/mtab etc/resolv.conf root srv dev proc sys " +
		"sbin/modprobe usr/lib/modules usr/lib/modules/.wrenn usr/lib/modules/.wrenn/work usr/lib/modules/.wrenn/work/work")
	ours, theirs := byName(guest), byName(reference)
	for name, line := range theirs {
		if ours[name] != line {
			t.Errorf("%s is\n%q, not\n%q", name, ours[name], line)
		}
	}
	for name, line := range ours {
		if _, ok := theirs[name]; ok {
			continue
		}
		known := false
		for _, a := range added {
			known = known || a == name
		}
		if !known {
			t.Errorf("%s %s is in neither the image nor Wrenn's list", name, line)
		}
	}
	if len(theirs) < 60 {
		t.Errorf("the reference has %d names", len(theirs))
	}
}

// noSecret checks that no file below a folder contains a secret.
func noSecret(t *testing.T, dir, secret string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasSuffix(p, ".ext4") || strings.HasSuffix(p, ".mem") {
			return err
		}
		if strings.Contains(read(p), secret) {
			t.Errorf("%s has the password", p)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// await waits for the agent's background work, which it does not announce.
func (h *host) await(t *testing.T, f func() bool) {
	t.Helper()
	await.Until(t, "the agent has finished", f)
}
