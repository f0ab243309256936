package recipe

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"
)

// TestCanonical shows the meaning of each form by its canonical text.
func TestCanonical(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"template", "FROM minimal", "FROM minimal\n"},
		{"tag", "from python:3.11\n", "FROM python:3.11\n"},
		{"image", "FROM oci:registry.example:5000/a/b:v1@sha256:" + strings.Repeat("0a", 32), "FROM oci:registry.example:5000/a/b:v1@sha256:" + strings.Repeat("0a", 32) + "\n"},
		{"comments, blank lines, CRLF, BOM", "\ufeff# syntax=docker/dockerfile:1\r\n\r\n  # more\r\nFROM\tminimal \r\n#x\r\nRUN a # b\r\n", "FROM minimal\nRUN a # b\n"},
		{"escape directive", "# escape=\\\nFROM a", "FROM a\n"},
		{"no directive any more", "# a comment\n# escape=`\nFROM a", "FROM a\n"},
		{"continuation", "FROM a\nRUN one \\\n  two\\\n\n# comment\n\t# comment\n three \\  \n&& four", "FROM a\nRUN one   two three && four\n"},
		{"keyword continued", "FR\\\nOM \\\na", "FROM a\n"},
		{"two backslashes end a line", "FROM a\nRUN printf x\\\\\nRUN b", "FROM a\nRUN printf x\\\\\nRUN b\n"},
		{"shell text stays", "FROM a\nrun  echo \"$A\" '${B}' \\$C \t", "FROM a\nRUN echo \"$A\" '${B}' \\$C\n"},
		{"exec", "FROM a\nRUN [ \"/bin/echo\" , \"a b\",\"\\\"\\u00e9<\\n\" ]", "FROM a\nRUN [\"/bin/echo\", \"a b\", \"\\\"é<\\n\"]\n"},
		{"the command [", "FROM a\nRUN [ -f x ] && y\nRUN [ \"a\" = \"b\" ] || z", "FROM a\nRUN [ -f x ] && y\nRUN [ \"a\" = \"b\" ] || z\n"},
		{"here-strings and shifts are the shell's", "FROM a\nRUN cat <<<x; echo $((1<<2)) '<<EOF' \"<<EOF\" \\<<EOF", "FROM a\nRUN cat <<<x; echo $((1<<2)) '<<EOF' \"<<EOF\" \\<<EOF\n"},
		{"env", `FROM a` + "\n" + `ENV a=b c="d e" f='g $h' i=j\ k l= m="x"'y'z`, "FROM a\nENV a=b c=\"d e\" f=\"g \\$h\" i=\"j k\" l=\"\" m=xyz\n"},
		{"env, old form", "FROM a\nENV a  b  'c  d' \nENV e =f", "FROM a\nENV a=\"b  c  d\"\nENV e==f\n"},
		{"env, variables", `FROM a` + "\n" + `ENV a=$b${c}d e=${f:-g} h=${i:+"j k"} l=${m-${n:-}} o=${p+q}r s="\$t \u $v"`, `FROM a` + "\n" + `ENV a=${b}${c}d e=${f:-g} h=${i:+"j k"} l=${m-${n:-""}} o=${p+q}r s="\$t \\u ${v}"` + "\n"},
		{"a dollar sign alone", `FROM a` + "\n" + `ENV a=$ b="$ " c=\$d e=$/`, `FROM a` + "\n" + `ENV a="\$" b="\$ " c="\$d" e="\$/"` + "\n"},
		{"copy", "FROM a\nCOPY a b\nCOPY --chown=u:g --chmod=755 *.c ./x ${D}/y/ /t/\nCOPY [\"a b\", \"$c\"]\nCOPY [ab] d/", "FROM a\nCOPY a b\nCOPY --chmod=0755 --chown=u:g *.c ./x ${D}/y/ /t/\nCOPY \"a b\" ${c}\nCOPY \"[ab]\" d/\n"},
		{"copy, like flags", `FROM a` + "\n" + `COPY ["--from", "b"]` + "\n" + `COPY a --from ./`, "FROM a\nCOPY \"--from\" b\nCOPY a \"--from\" ./\n"},
		{"workdir", "FROM a\nWORKDIR /a b/$c\nWORKDIR  'x'y", "FROM a\nWORKDIR \"/a b/${c}\"\nWORKDIR xy\n"},
		{"user", "FROM a\nUSER ${u:-1000}:g", "FROM a\nUSER ${u:-1000}:g\n"},
		{"start and health check come last", "FROM a\nHEALTHCHECK --interval=90s --retries=5 --timeout=1500ms --start-period=0s cmd curl -f localhost\nSTART [\"srv\"]\nRUN b", "FROM a\nRUN b\nSTART [\"srv\"]\nHEALTHCHECK --interval=1m30s --timeout=1.5s --retries=5 CMD curl -f localhost\n"},
		{"health check in exec form", "FROM a\nHEALTHCHECK CMD [\"x\"]", "FROM a\nHEALTHCHECK CMD [\"x\"]\n"},
		{"limits come in the order of their names", "FROM a\nLIMIT net_bytes=0  disk_ops=50 \\\n disk_bytes=10000000000\nRUN b", "FROM a\nRUN b\nLIMIT disk_bytes=10000000000 disk_ops=50 net_bytes=0\n"},
		{"no health check", "FROM a\nHEALTHCHECK none", "FROM a\nHEALTHCHECK NONE\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := Parse(c.in)
			if err != nil {
				t.Fatal(err)
			}
			if got := r.String(); got != c.want {
				t.Errorf("%q is\n%s, not\n%s", c.in, got, c.want)
			}
			again, err := Parse(c.want)
			if err != nil || again.String() != c.want {
				t.Errorf("the canonical form is %v, %v", again, err)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"", "1:1: the recipe is empty"},
		{"# nothing\n", "1:1: the recipe is empty"},
		{"FROM a\nCMD [\"x\"]\n  EXPOSE 80\n\nENTRYPOINT x", "2:1: recipes have no CMD: use START for the command that runs in the template\n3:3: recipes have no EXPOSE: clients can reach every port of a sandbox; remove this line\n5:1: recipes have no ENTRYPOINT"},
		{"ARG x=1\nFROM a", "1:1: recipes have no ARG: use ENV"},
		{"RUN x\nRUN y\nFROM a", "1:1: RUN comes before FROM"},
		{"FROM a\nLABLE x=y", "2:1: unknown instruction \"LABLE\"; the instructions are FROM"},
		{"FROM a\nFROM b", "2:1: a second FROM: a recipe has one stage; the first FROM is at 1:1"},
		{"FROM", "1:5: FROM needs"},
		{"FROM a AS b", "1:8: a recipe has one stage"},
		{"FROM a \t b", "1:10: FROM takes one name"},
		{"FROM --platform=linux/amd64 a", "1:6: FROM takes no flags"},
		{"FROM a$b", "1:7: FROM takes no variables"},
		{"FROM scratch", "1:6: recipes cannot start from scratch"},
		{"FROM library/a", "1:6: \"library/a\" is not a template's name; for an OCI image write oci: before the name"},
		{"FROM A", "1:6: \"A\" is not a template's name"},
		{"FROM a:", "1:8: \"\" is not a tag"},
		{"FROM oci:", "1:10: \"\" is not an image's reference"},
		{"FROM oci:A/b", "1:10: \"A/b\" is not an image's reference"},
		{"FROM a\nRUN", "2:4: RUN needs a command"},
		{"FROM a\nRUN --mount=type=cache x", "2:5: RUN takes no flags"},
		{"FROM a\nRUN [\"a\", 'b']", "2:11: this is not a JSON array"},
		{"FROM a\nRUN [\"a\"", "2:8: this is not a JSON array"},
		{"FROM a\nRUN [\"é\", \\\n  x]", "3:3: this is not a JSON array"},
		{"FROM a\nRUN [\"a\", 1]", "2:5: a list may contain only strings"},
		{"FROM a\nRUN [\"a\", null]", "2:5: a list may contain only strings"},
		{"FROM a\nRUN []", "2:5: the list contains no program"},
		{"FROM a\nRUN [\"\"]", "2:5: the list contains no program"},
		{"FROM a\nRUN [\"a\\u0000\"]", "2:5: an argument cannot contain a NUL"},
		{"FROM a\nRUN cat <<EOF >x\nEOF\nLABEL x", "2:9: recipes have no here-documents"},
		{"FROM a\nCOPY <<EOF /x\nEOF", "2:6: recipes have no here-documents"},
		{"FROM a\nRUN x \\", "2:7: this \\ continues the line"},
		{"FROM a\nLABEL x\nRUN ü \\\n\n# x\n", "2:1: recipes have no LABEL: a template has a name and tags; remove this line\n3:7: this \\ continues"},
		{"FROM a\nENV", "2:4: ENV needs"},
		{"FROM a\nENV x", "2:5: x has no value"},
		{"FROM a\nENV x=1 y", "2:9: y has no value"},
		{"FROM a\nENV é=ü 1=2", "2:5: \"é\" is not a variable's name"},
		{"FROM a\nENV a=ü 1=2", "2:9: \"1\" is not a variable's name"},
		{"FROM a\nENV a=\"ü", "2:7: this quote is not closed"},
		{"FROM a\nENV a=b'ü", "2:8: this quote is not closed"},
		{"FROM a\nENV a=\"\\", "2:8: this \\ continues the line"},
		{"FROM a\nENV a=b\\\\\\", "2:10: nothing follows this backslash"},
		{"FROM a\nENV a=b \\\n   c=${d", "3:6: this ${ has no }"},
		{"FROM a\nENV a=${b?c}", "2:10: after a variable's name"},
		{"FROM a\nENV a=${b:?c}", "2:10: after a variable's name"},
		{"FROM a\nENV a=${}", "2:7: this ${ has no variable's name"},
		{"FROM a\nENV a=$$", "2:7: recipes have no $$; for a dollar sign write \\$"},
		{"FROM a\nENV a=$1", "2:7: recipes have no $1"},
		{"FROM a\nENV a=" + strings.Repeat("${a:-", 40) + strings.Repeat("}", 40), "more than 32 nested variables"},
		{"FROM a\nCOPY", "2:5: COPY needs"},
		{"FROM a\nCOPY a", "2:7: COPY needs"},
		{"FROM a\nCOPY --from=x a b", "2:6: COPY takes no --from"},
		{"FROM a\nCOPY --chmod=u+x a b", "2:6: --chmod needs a mode"},
		{"FROM a\nCOPY --chmod=$x a b", "2:6: --chmod needs a mode"},
		{"FROM a\nCOPY --chown= a b", "2:6: --chown needs a user"},
		{"FROM a\nCOPY --chown a b", "2:6: --chown needs a value"},
		{"FROM a\nCOPY --chown=x --chown=y a b", "2:16: a second --chown"},
		{"FROM a\nCOPY --frob=1 a b", "2:6: unknown flag --frob; the flags are --chmod, --chown"},
		{"FROM a\nCOPY a HTTPS://x b/", "2:8: COPY copies only from the build's folder: fetch"},
		{"FROM a\nCOPY a/../../b c", "2:6: COPY copies only from the build's folder, and .."},
		{"FROM a\nCOPY \"\" c", "2:6: the path is empty"},
		{"FROM a\nCOPY c ''", "2:8: the target is empty"},
		{"FROM a\nCOPY a b c", "2:10: several files need a folder"},
		{"FROM a\nCOPY a* c", "2:9: several files need a folder"},
		{"FROM a\nCOPY [\"a\\nb\", \"c\"]", "2:6: a path cannot contain a control"},
		{"FROM a\nCOPY [\"a'\", \"c\"]", "2:6: this quote is not closed"},
		{"FROM a\nWORKDIR", "2:8: WORKDIR needs a folder"},
		{"FROM a\nUSER ''", "2:6: USER needs a user"},
		{"FROM a\nSTART x\nSTART y", "3:1: a second START; the first is at 2:1"},
		{"FROM a\nLIMIT", "2:6: LIMIT needs NAME=NUMBER; the names are disk_bytes, disk_ops, net_bytes, net_packets"},
		{"FROM a\nLIMIT disk_ops=50 speed=1", "2:19: unknown limit \"speed\""},
		{"FROM a\nLIMIT disk_ops=49", "2:7: disk_ops needs a number from 50 to 10000000000, or 0"},
		{"FROM a\nLIMIT disk_ops", "2:7: disk_ops needs a number"},
		{"FROM a\nLIMIT net_bytes=10000000001", "2:7: net_bytes needs a number"},
		{"FROM a\nLIMIT disk_ops=50 disk_ops=60", "2:19: a second disk_ops"},
		{"FROM a\nLIMIT disk_ops=50\nLIMIT disk_ops=60", "3:1: a second LIMIT; the first is at 2:1"},
		{"FROM a\nHEALTHCHECK", "2:12: HEALTHCHECK needs CMD"},
		{"FROM a\nHEALTHCHECK curl x", "2:13: HEALTHCHECK needs CMD"},
		{"FROM a\nHEALTHCHECK CMD", "2:16: HEALTHCHECK CMD needs a command"},
		{"FROM a\nHEALTHCHECK NONE x", "2:13: HEALTHCHECK NONE takes"},
		{"FROM a\nHEALTHCHECK --interval=5 CMD x", "2:13: --interval needs a time"},
		{"FROM a\nHEALTHCHECK --timeout=-1s CMD x", "2:13: --timeout needs a time"},
		{"FROM a\nHEALTHCHECK --retries=-1 CMD x", "2:13: --retries needs a number"},
		{"FROM a\nHEALTHCHECK --start-interval=1s CMD x", "2:13: HEALTHCHECK takes no --start-interval"},
		{"FROM a\nHEALTHCHECK NONE\nHEALTHCHECK NONE", "3:1: a second HEALTHCHECK; the first is at 2:1"},
		{"# escape=`\nFROM a", "1:1: the escape character of recipes is the backslash"},
		{"FROM a\nRUN \x1b[31m", "2:5: the text contains the control character U+001B"},
		{"FROM a\rRUN b", "1:7: the text contains the control character U+000D"},
		{"FROM a\nRUN é\xff", "2:6: the text is not UTF-8"},
		{"#" + strings.Repeat("x", MaxSize), "1:1: the recipe is longer"},
	} {
		r, err := Parse(c.in)
		if err == nil {
			t.Errorf("%.100q is accepted as %q", c.in, r)
			continue
		}
		if !strings.HasPrefix(err.Error(), c.want) && !(c.want[0] == 'm' && strings.Contains(err.Error(), c.want)) {
			t.Errorf("%.100q:\n%v, not\n%s", c.in, err, c.want)
		}
		if strings.Count(c.want, "\n") != strings.Count(err.Error(), "\n") {
			t.Errorf("%.100q has other errors too: %v", c.in, err)
		}
		inside(t, c.in, err)
	}
}

// inside checks that an error has Parse's type, and that each of its positions is in the
// text or right behind a line.
func inside(t testing.TB, text string, err error) {
	t.Helper()
	var errs Errors
	if !errors.As(err, &errs) || len(errs) == 0 {
		t.Fatalf("the error is %T", err)
	}
	lines := strings.Split(text, "\n")
	before := Position{}
	for _, e := range errs {
		p := e.Pos
		if p.Line < 1 || p.Line > len(lines) || p.Column < 1 || p.Column > utf8.RuneCountInString(lines[p.Line-1])+1 {
			t.Fatalf("%q: %v lies outside of the text", text, e)
		}
		if p.Line < before.Line {
			t.Fatalf("%q: errors are not in the order of the text: %v", text, err)
		}
		if e.Message == "" || !utf8.ValidString(e.Message) {
			t.Fatalf("%q: message %q", text, e.Message)
		}
		before = p
	}
}

func TestPositions(t *testing.T) {
	r, err := Parse("\n  FROM a\n\nRUN x \\\n  y\n ENV a=b \\\n  ü=1\n")
	if err == nil {
		t.Fatalf("accepted as %v", r)
	}
	if want := (Position{7, 3}); err.(Errors)[0].Pos != want {
		t.Errorf("%v, not at %v", err, want)
	}
	r, err = Parse("\n  FROM a\n\nRUN x \\\n  y\n ENV a=b \\\n  c=${d}\n START x\nHEALTHCHECK NONE")
	if err != nil {
		t.Fatal(err)
	}
	env := r.Steps[1].(*Env)
	for _, c := range []struct{ got, want Position }{
		{r.From.Pos, Position{2, 3}},
		{r.Steps[0].Position(), Position{4, 1}},
		{env.Pos, Position{6, 2}},
		{env.Vars[0].Value.Pos, Position{6, 8}},
		{env.Vars[1].Value.Pos, Position{7, 5}},
		{r.Start.Pos, Position{8, 2}},
		{r.HealthCheck.Pos, Position{9, 1}},
	} {
		if c.got != c.want {
			t.Errorf("%v, not %v", c.got, c.want)
		}
	}
}

// TestExpand includes the examples of the Dockerfile reference's "Environment
// replacement".
func TestExpand(t *testing.T) {
	vars := map[string]string{"foo": "/bar", "empty": "", "A_1": "x y"}
	lookup := func(name string) (string, bool) { v, ok := vars[name]; return v, ok }
	for in, want := range map[string]string{
		`${foo}`: "/bar", `$foo`: "/bar", `\$foo`: "$foo", `\${foo}`: "${foo}", `$foo_`: "", `${foo}_`: "/bar_",
		`$foo/$none/x`: "/bar//x", `'$foo'`: "$foo", `"$foo"`: "/bar", `"'$foo'"`: "'/bar'", `$A_1`: "x y",
		`${none:-d}`: "d", `${none-d}`: "d", `${empty:-d}`: "d", `${empty-d}`: "", `${foo:-d}`: "/bar", `${foo-d}`: "/bar",
		`${none:+d}`: "", `${none+d}`: "", `${empty:+d}`: "", `${empty+d}`: "d", `${foo:+d}`: "d", `${foo+d}`: "d",
		`${none:-$foo/${none:-"a }b"}}`: "/bar/a }b", `${none:-'}'}x`: "}x", `${none:-\}}x`: "}x", `"${none:-"a  b"}"`: "a  b",
		`${none:-}`: "", `a\ b`: "a b", `"a\"b\\c\d"`: `a"b\c\d`, `é${none:-ü}`: "éü", `$é`: "$é",
	} {
		r, err := Parse("FROM a\nENV x=" + in)
		if err != nil {
			t.Errorf("%s: %v", in, err)
			continue
		}
		got, err := r.Steps[0].(*Env).Vars[0].Value.Expand(lookup)
		if err != nil || got != want {
			t.Errorf("%s is %q, %v, not %q", in, got, err, want)
		}
	}
	// Growth by repetition is refused before it costs anything.
	r, err := Parse("FROM a\nWORKDIR /\nUSER " + strings.Repeat("$big", 40_000))
	if err != nil {
		t.Fatal(err)
	}
	vars["big"] = strings.Repeat("x", 1000)
	_, err = r.Steps[1].(*User).Name.Expand(lookup)
	if e := (*Error)(nil); !errors.As(err, &e) || e.Pos != (Position{3, 6}) {
		t.Errorf("expanded to 40 MB: %v", err)
	}
}

func TestArgs(t *testing.T) {
	if got := fmt.Sprintf("%q", (Command{Shell: "a b"}).Args()); got != `["/bin/sh" "-c" "a b"]` {
		t.Error(got)
	}
	if got := fmt.Sprintf("%q", (Command{Exec: []string{"a b"}}).Args()); got != `["a b"]` {
		t.Error(got)
	}
}

// FuzzParse checks that a text is either a recipe, whose canonical form is the same
// recipe, or refused at positions inside it.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"FROM minimal\nRUN a \\\n b\nENV a=b c=\"d $e\" \nENV x y z\nCOPY --chmod=755 --chown=a:b a* b/\nWORKDIR /x\nUSER a\nSTART [\"a\"]\nHEALTHCHECK --retries=3 CMD x",
		"FROM oci:a/b:c\nRUN [ -f x ]", "FROM a\nENV a=${b:-${c+d}}'e'\\ f$", "# escape=`\nFROM a", "FROM a\nRUN cat <<EOF\nEOF", "FROM a\nCOPY [\"--a\", \"[\"]\nCOPY [ ]",
		"FROM a\nRUN [\"a\", ", "FROM a\r\nRUN b \\\r\n#x\r\n c", "\ufeffFROM a\nWORKDIR \"a \"", "FROM a\nRUN a\\ \\\n\\\\\n", "FROM a\nRUN \\\n\\\nx\\\n", "FROM a\nHEALTHCHECK NONE", "FROM a\nLIMIT disk_ops=50 net_bytes=0",
		"FROM a\nENV A=\"<<EOF\"\nCOPY \"<<EOF\" b",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		r, err := Parse(text)
		if err != nil {
			inside(t, text, err)
			return
		}
		canonical := r.String()
		again, err := Parse(canonical)
		if err != nil {
			t.Fatalf("%q: canonical form %q: %v", text, canonical, err)
		}
		if got := again.String(); got != canonical {
			t.Fatalf("%q: %q becomes %q", text, canonical, got)
		}
		if len(again.Steps) != len(r.Steps) || (r.Start == nil) != (again.Start == nil) {
			t.Fatalf("%q: canonical form %q is another recipe", text, canonical)
		}
		// The words mean the same, whatever the variables are.
		for _, value := range []string{"", "v $x"} {
			lookup := func(n string) (string, bool) { return value, n[0]&1 == 0 }
			a, b := expandAll(r, lookup), expandAll(again, lookup)
			if a != b {
				t.Fatalf("%q expands to %q, its canonical form to %q", text, a, b)
			}
		}
	})
}

func expandAll(r *Recipe, lookup func(string) (string, bool)) string {
	var words []Word
	for _, s := range r.Steps {
		switch s := s.(type) {
		case *Env:
			for _, v := range s.Vars {
				words = append(words, v.Value)
			}
		case *Copy:
			words = append(append(words, s.Sources...), s.Target)
			if s.Owner != nil {
				words = append(words, *s.Owner)
			}
		case *Workdir:
			words = append(words, s.Path)
		case *User:
			words = append(words, s.Name)
		}
	}
	var b strings.Builder
	for _, w := range words {
		text, err := w.Expand(lookup)
		fmt.Fprintf(&b, "%q %v\n", text, err != nil)
	}
	return b.String()
}
