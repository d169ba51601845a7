package expr_test

import (
	"encoding/json"
	"math"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/spec/expr"
)

func scope() expr.MapScope {
	return expr.MapScope{
		"input": map[string]any{
			"amount": 2.5, "count": float64(3), "type": "refund", "use_gpu": true, "big": json.Number("12"), "huge": 1e300,
			"items": []any{1.0, map[string]any{"x": "y"}}, "nothing": nil, "a b": "spaced", "t": "2030-01-31T12:00:00Z",
		},
		"order":   map[string]any{"id": "o1", "total": 10.0, "in": 5.0},
		"status":  "pending",
		"package": "reserved in CEL",
		"lists":   map[string]any{"size": 4.0},
	}
}

func TestTemplates(t *testing.T) {
	for source, want := range map[string]any{
		"plain":                 "plain",
		"":                      "",
		"$order.total":          10.0,
		"$input.items":          []any{1.0, map[string]any{"x": "y"}},
		"$input.items[1].x":     "y",
		`$input["a b"]`:         "spaced",
		"$input['a b']":         "spaced",
		"$input.nothing":        nil,
		"$package":              "reserved in CEL",
		"Order $order.id.":      "Order o1.",
		"$order.id$order.total": "o110",
		"$input.amount and $input.nothing and $input.use_gpu": "2.5 and null and true",
		"items: $input.items":     `items: [1,{"x":"y"}]`,
		"$$5 $5 $ $$order.id $":   "$5 $5 $ $order.id $",
		"$${order}":               "${order}",
		"$$":                      "$",
		"${ $order.total * 2 }":   int64(20),
		"${ $order.total * 1.2 }": 12.0,
		"${ 2 * $input.amount }":  5.0,
		"${ $input.amount - 1 }":  1.5,
		"${ 1 / 4.0 }":            0.25,
		"${ $order.total / 4 }":   int64(2),
		"${ ((($input.count + 1) * 1.5) + 1) * 2.5 }": 17.5,
		"${ $input.big + 1 }":                         int64(13),
		"${ $input.huge }":                            1e300,
		"${ order.total + input.amount }":             12.5,
		"a ${ {'a': 1}.a } b":                         "a 1 b",
		"${ {'a': [1, 2.5, 'x', null, true]} }":       map[string]any{"a": []any{int64(1), 2.5, "x", nil, true}},
		"${ '}' + \"}\" }":                            "}}",
		"${ 'ö$foo' + $order.id }":                    "ö$fooo1",
		`${ r'\' + "\"$x" }`:                          `\"$x`,
		"${ $input.items.exists(i, i == 1) }":         true,
		"${ $input.items.map(input, input == 1) }":    []any{true, false},
		"${ has($input.zzz) ? 1 : 2 }":                int64(2),
		"${ has(input.count) }":                       true,
		"${ $input.?zzz.orValue(3) }":                 int64(3),
		"${ $input.?zzz }":                            nil,
		"${ $order.in }":                              int64(5),
		"${ type($order.total) == int }":              true,
		"${ $lists.size }":                            int64(4),
		"${ lists.size }":                             int64(4),
		"${ math.greatest($input.count, 2) }":         int64(3),
		"${ 'a-b'.split('-') }":                       []any{"a", "b"},
		"${ timestamp($input.t) + duration('1h') }":   "2030-01-31T13:00:00Z",
		"${ duration('90s') }":                        "1m30s",
		"${ b'hi' }":                                  "aGk=",
		"${ $package }":                               "reserved in CEL",
		"${ 1e3 }":                                    1000.0,
		"${ 0x1F }":                                   int64(31),
		"${ 7u }":                                     int64(7),
	} {
		t.Run(source, func(t *testing.T) {
			tmpl, err := expr.ParseTemplate(source)
			require.NoError(t, err)
			got, err := tmpl.Eval(scope())
			require.NoError(t, err)
			require.Empty(t, cmp.Diff(want, got))
		})
	}
}

func TestTemplateOfAnyShape(t *testing.T) {
	source := map[string]any{
		"id": "$order.id", "list": []any{"$order.total", int64(1), map[string]any{"deep": "n=$input.count"}}, "n": int64(5), "none": nil,
	}
	tmpl, err := expr.ParseTemplate(source)
	require.NoError(t, err)
	got, err := tmpl.Eval(scope())
	require.NoError(t, err)
	require.Empty(t, cmp.Diff(map[string]any{
		"id": "o1", "list": []any{10.0, int64(1), map[string]any{"deep": "n=3"}}, "n": int64(5), "none": nil,
	}, got))
	require.Empty(t, cmp.Diff([]expr.Ref{
		{Root: "order", Path: "id", Text: "$order.id", At: "id"},
		{Root: "order", Path: "total", Text: "$order.total", At: "list[0]"},
		{Root: "input", Path: "count", Text: "$input.count", At: "list[2].deep", Offset: 2},
	}, tmpl.Refs()))
	_, literal := tmpl.Literal()
	require.False(t, literal)

	tmpl, err = expr.ParseTemplate(map[string]any{"a": []any{"b", "$$c"}})
	require.NoError(t, err)
	first, literal := tmpl.Literal()
	require.True(t, literal)
	require.Equal(t, map[string]any{"a": []any{"b", "$c"}}, first)
	first.(map[string]any)["a"] = "changed"
	second, err := tmpl.Eval(expr.MapScope{})
	require.NoError(t, err)
	require.Equal(t, map[string]any{"a": []any{"b", "$c"}}, second, "a caller may change what it got")
}

func TestEvaluationErrors(t *testing.T) {
	for source, want := range map[string]string{
		"$order.tot":                    `$order.tot: $order has no field "tot"; the fields there are: id, in, total`,
		"x $order.tot":                  `$order.tot: $order has no field "tot"; the fields there are: id, in, total`,
		"$nope.x":                       "$nope.x: nothing is named $nope here; the names there are: input, lists, order, package, status",
		"$order.id.x":                   `$order.id.x: $order.id is a string, it has no field "x"`,
		"$input.nothing.x":              `$input.nothing.x: $input.nothing is null, it has no field "x"`,
		"$input.items[2]":               "$input.items[2]: $input.items has 2 items, there is no [2]",
		"$order[0]":                     "$order[0]: $order is an object, not a list",
		"${ $order.tot + 1 }":           `$order.tot + 1: $order has no field "tot"; the fields there are: id, in, total`,
		"${ nope }":                     "nope: nothing is named nope here; the names there are: input, lists, order, package, status",
		"${ $input.items[9] }":          "$input.items[9]: $input.items has 2 items, there is no [9]",
		"${ 'a' + $order.total }":       "'a' + $order.total: cannot add string and int",
		"${ $input.items.map(x, x.y) }": "",
		"${ 1 / ($order.total - 10) }":  "1 / ($order.total - 10): division by zero",
		"${ lists.range(9999).map(x, lists.range(9999).map(y, lists.range(9999))) }": "lists.range(9999).map(x, lists.range(9999).map(y, lists.range(9999))): the expression takes too long to evaluate; give it less data or split it",
		"${ size(lists.range(100000000)) }":                                          "",
		"${ 1.0 / 0.0 }":                                                             "1.0 / 0.0: the result is not a finite number",
		"${ int }":                                                                   "int: a value of type type cannot be a result",
	} {
		t.Run(source, func(t *testing.T) {
			tmpl, err := expr.ParseTemplate(source)
			require.NoError(t, err)
			_, err = tmpl.Eval(scope())
			require.Error(t, err)
			if want != "" {
				require.EqualError(t, err, want)
			}
			t.Log(err)
		})
	}
	tmpl, err := expr.ParseTemplate(map[string]any{"lines": []any{map[string]any{"price": "$order.prize"}}})
	require.NoError(t, err)
	_, err = tmpl.Eval(scope())
	require.EqualError(t, err, `lines[0].price: $order.prize: $order has no field "prize"; the fields there are: id, in, total`)
}

func TestParseErrors(t *testing.T) {
	for source, want := range map[string]string{
		"${ 1 + }":              "1 +: mismatched input '<EOF>'",
		"${ 1 + 'a' }":          "found no matching overload for '_+_' applied to '(int, string)'",
		"${":                    "`${` is not closed",
		"${ 'a }":               "`${` is not closed",
		"${ }":                  "the expression is empty",
		"${ $ }":                "a `$` must be followed by a name",
		"${ foo($order) }":      "undeclared reference to 'foo'",
		"${ 'a'.matches('(') }": "",
		"${ " + strings.Repeat("(", 500) + "1" + strings.Repeat(")", 500) + " }": "",
		"${ " + strings.Repeat("1 + ", 5000) + "1 }":                             "",
		"$x" + strings.Repeat("x", expr.MaxSourceBytes):                          "the limit is 16384",
	} {
		_, err := expr.ParseTemplate(source)
		require.Error(t, err, source)
		require.ErrorContains(t, err, want)
		require.NotContains(t, err.Error(), "d__")
		require.NotContains(t, err.Error(), "b__")
		require.Less(t, len(err.Error()), 2000)
	}
	_, err := expr.ParseTemplate(map[string]any{"a": "${ 1 + }", "b": "${", "c": "$fine"})
	var all expr.Errors
	require.ErrorAs(t, err, &all)
	require.Len(t, all, 2)
	require.Equal(t, []string{"a", "b"}, []string{all[0].At, all[1].At})
}

func TestDeepTemplatesAreRefused(t *testing.T) {
	var v any = "$x"
	for range 200 {
		v = []any{v}
	}
	_, err := expr.ParseTemplate(v)
	require.ErrorContains(t, err, "nested more than 100 deep")
}

func TestHugeResultsAreRefused(t *testing.T) {
	tmpl, err := expr.ParseTemplate(strings.Repeat("$big", 20))
	require.NoError(t, err)
	_, err = tmpl.Eval(expr.MapScope{"big": strings.Repeat("x", 1<<20)})
	require.ErrorContains(t, err, "too large")

	doubled := "[1,2,3,4,5,6,7,8]"
	for range 12 {
		doubled = "cel.bind(a, " + doubled + ", a + a + a + a)"
	}
	tmpl, err = expr.ParseTemplate("${" + doubled + "}")
	require.NoError(t, err)
	_, err = tmpl.Eval(expr.MapScope{})
	require.Error(t, err)

	tmpl, err = expr.ParseTemplate("${ $n }")
	require.NoError(t, err)
	_, err = tmpl.Eval(expr.MapScope{"n": math.NaN()})
	require.ErrorContains(t, err, "finite")
}

func TestConditions(t *testing.T) {
	for source, want := range map[string]bool{
		"$input.use_gpu":                         true,
		"input.use_gpu":                          true,
		"${ $input.use_gpu }":                    true,
		"status == 'pending'":                    true,
		"$status == \"pending\"":                 true,
		"status in ['a', 'pending']":             true,
		"$order.total > 5":                       true,
		"$order.total == 10.0":                   true,
		"order.total >= $input.amount":           true,
		"$input.type == 'refund'":                true,
		"'$status' == '$' + 'status'":            true,
		"!($input.count < 3) && true":            true,
		"$input.nope == 1 || $input.use_gpu":     true,
		"has($input.nope) && $input.nope > 1":    false,
		"$input.nothing == null":                 true,
		"size($input.items) == 2 // all of them": true,
		"true":                                   true,
	} {
		c, err := expr.ParseCondition(source)
		require.NoError(t, err, source)
		require.Equal(t, source, c.Source())
		got, err := c.Eval(scope())
		require.NoError(t, err, source)
		require.Equal(t, want, got, source)
	}
}

func TestConditionsMustBeTrueOrFalse(t *testing.T) {
	_, err := expr.ParseCondition("'abc'")
	require.ErrorContains(t, err, "a condition must be true or false, this one is always of type string")
	c, err := expr.ParseCondition("$order.id")
	require.NoError(t, err)
	_, err = c.Eval(scope())
	require.ErrorContains(t, err, "a condition must be true or false, this one gave a value of type string")
	c, err = expr.ParseCondition("$input.type == 'refund' && $input.nope > 1")
	require.NoError(t, err)
	_, err = c.Eval(scope())
	require.ErrorContains(t, err, `$input has no field "nope"; the fields there are: a b, amount, `)
}

// record is a scope in which bare names are fields, as in preconditions.
type record struct {
	expr.MapScope
	fields map[string]any
}

func (r record) LookupBare(name string) (any, bool) {
	v, ok := r.fields[name]
	return v, ok
}

func TestBareNamesCanMeanSomethingElse(t *testing.T) {
	c, err := expr.ParseCondition("type == 'card' && $type == 'input' && [1].all(type, type == 1)")
	require.NoError(t, err)
	got, err := c.Eval(record{expr.MapScope{"type": "input"}, map[string]any{"type": "card"}})
	require.NoError(t, err)
	require.True(t, got)
	require.Empty(t, cmp.Diff([]expr.Ref{
		{Root: "type", Text: "type", Bare: true},
		{Root: "type", Text: "$type", Offset: 18},
	}, c.Refs()))
}

func TestRefsOfExpressions(t *testing.T) {
	tmpl, err := expr.ParseTemplate("é ${ $a.b[0].c + (has(x.y) ? $z['k k'] : $a.b[$i].c) }")
	require.NoError(t, err)
	require.Empty(t, cmp.Diff([]expr.Ref{
		{Root: "a", Path: "b[0].c", Text: "$a.b[0].c", Offset: 6},
		{Root: "x", Path: "y", Text: "x.y", Offset: 23, Bare: true, Tested: true},
		{Root: "z", Path: `["k k"]`, Text: `$z["k k"]`, Offset: 30},
		{Root: "a", Path: "b", Text: "$a.b", Offset: 42},
		{Root: "i", Text: "$i", Offset: 47},
	}, tmpl.Refs()))
}

func TestConcurrentEvaluation(t *testing.T) {
	tmpl, err := expr.ParseTemplate(map[string]any{"a": "${ $order.total * 1.5 }", "b": "$order.id"})
	require.NoError(t, err)
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for range 100 {
				v, err := tmpl.Eval(scope())
				if err != nil || v.(map[string]any)["a"] != 15.0 {
					t.Errorf("got %v, %v", v, err)
					return
				}
			}
		})
	}
	group.Wait()
}

func FuzzTemplate(f *testing.F) {
	for _, seed := range []string{"$order.total", "a $x.y[0] ${ $order.total * 2 } $$", "${ has($a.b) ? 'x' : r\"y\" }", `$a["b c"]`, "${ {'a': [1]}.a.map(x, x + 1) }", "${ `a` // c\n }"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, source string) {
		tmpl, err := expr.ParseTemplate(source)
		if err != nil {
			require.NotEmpty(t, err.Error())
			return
		}
		for _, ref := range tmpl.Refs() {
			require.NotEmpty(t, ref.Root)
			require.GreaterOrEqual(t, ref.Offset, 0)
			require.LessOrEqual(t, ref.Offset, len(source))
		}
		if v, err := tmpl.Eval(scope()); err == nil {
			_, err = json.Marshal(v)
			require.NoError(t, err)
		}
	})
}

func FuzzCondition(f *testing.F) {
	for _, seed := range []string{"$input.use_gpu", "status == 'pending' && size($a) > 1.5e3", "!has(x.?y) || 'a'.matches('b+')"} {
		f.Add(seed)
	}
	f.Fuzz(func(_ *testing.T, source string) {
		if c, err := expr.ParseCondition(source); err == nil {
			_, _ = c.Eval(scope())
			_ = c.Refs()
		}
	})
}

func BenchmarkReference(b *testing.B) {
	tmpl, err := expr.ParseTemplate("$order.total")
	require.NoError(b, err)
	s := scope()
	for b.Loop() {
		_, _ = tmpl.Eval(s)
	}
}

func BenchmarkCondition(b *testing.B) {
	c, err := expr.ParseCondition("$order.total > 5 && $input.use_gpu")
	require.NoError(b, err)
	s := scope()
	for b.Loop() {
		_, _ = c.Eval(s)
	}
}
