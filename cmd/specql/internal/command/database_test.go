package command

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestNoPasswordIsShown(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"postgres://u:s3cret@h/d":                        "postgres://u:xxxxx@h/d",
		"postgres://u@h/d":                               "postgres://u@h/d",
		"postgresql://u:p%40ss%2Fword@h:5432/d":          "postgresql://u:xxxxx@h:5432/d",
		"postgres://h/d?password=s3cret&sslmode=disable": "postgres://h/d?password=xxxxx&sslmode=disable",
		"sqlite:specql.db":                               "sqlite:specql.db",
	} {
		require.Equal(t, want, redactURL(text))
		d := database{url: text}
		for _, said := range []string{"cannot reach " + text, "bad password s3cret", "bad p@ss/word, p%40ss%2Fword"} {
			got := d.hide(errors.New(said)).Error()
			if text != want {
				require.NotContains(t, got, text)
			}
			switch {
			case text == "postgres://u:s3cret@h/d", text == "postgres://h/d?password=s3cret&sslmode=disable":
				require.NotContains(t, got, "s3cret")
			case text == "postgresql://u:p%40ss%2Fword@h:5432/d":
				require.NotContains(t, got, "ss/word")
				require.NotContains(t, got, "ss%2Fword")
			}
		}
	}
	for _, text := range []string{"postgres://u:pa/s3cret@h:x/d", "postgres://u:%zzs3cret@h/d", "host=h password=s3cret", "mysql://u:s3cret@h/d", "s3cret"} {
		err := checkDatabaseURL(text)
		require.Error(t, err, text)
		require.NotContains(t, err.Error(), "s3cret")
		exit, ok := errors.AsType[*exitError](err)
		require.True(t, ok)
		require.Equal(t, Misuse, exit.status)
	}
}
