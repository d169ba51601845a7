package expr

import (
	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
	"cel.dev/cel-go/interpreter"
)

// JSON has one kind of number, CEL three that do not mix: 10 * 1.2 is an error there. Here an operation on an int and a
// double counts the int as a double, since no author can know whether a service answers 10 or 10.5.

var verbs = map[string]string{
	operators.Add: "add", operators.Subtract: "subtract", operators.Multiply: "multiply", operators.Divide: "divide",
}

// mixedArithmetic declares the mixed overloads for the type check; promoteNumbers carries them out.
func mixedArithmetic() cel.EnvOption {
	options := []cel.EnvOption{}
	for operator, verb := range verbs {
		options = append(options, cel.Function(operator,
			cel.Overload(verb+"_int64_double", []*cel.Type{cel.IntType, cel.DoubleType}, cel.DoubleType),
			cel.Overload(verb+"_double_int64", []*cel.Type{cel.DoubleType, cel.IntType}, cel.DoubleType)))
	}
	return func(e *cel.Env) (*cel.Env, error) {
		var err error
		for _, option := range options {
			if e, err = option(e); err != nil {
				return nil, err
			}
		}
		return e, nil
	}
}

// promoteNumbers replaces the arithmetic of a program.
func promoteNumbers(i interpreter.InterpretableV2) (interpreter.InterpretableV2, error) {
	call, ok := i.(interpreter.InterpretableCall)
	if !ok || verbs[call.Function()] == "" || len(call.Args()) != 2 {
		return i, nil
	}
	return arithmetic{call}, nil
}

type arithmetic struct{ interpreter.InterpretableCall }

// Exec implements interpreter.InterpretableV2.
func (a arithmetic) Exec(frame *interpreter.ExecutionFrame) ref.Val {
	args := a.Args()
	left := args[0].Exec(frame)
	if types.IsUnknownOrError(left) {
		return left
	}
	right := args[1].Exec(frame)
	if types.IsUnknownOrError(right) {
		return right
	}
	if i, ok := left.(types.Int); ok {
		if _, ok := right.(types.Double); ok {
			left = types.Double(i)
		}
	}
	if i, ok := right.(types.Int); ok {
		if _, ok := left.(types.Double); ok {
			right = types.Double(i)
		}
	}
	out := operate(a.Function(), left, right)
	if types.IsError(out) && left.Type() != right.Type() {
		return types.NewErr("cannot %s %s and %s", verbs[a.Function()], left.Type().TypeName(), right.Type().TypeName())
	}
	return out
}

func operate(operator string, left, right ref.Val) ref.Val {
	switch operator {
	case operators.Add:
		if l, ok := left.(traits.Adder); ok {
			return l.Add(right)
		}
	case operators.Subtract:
		if l, ok := left.(traits.Subtractor); ok {
			return l.Subtract(right)
		}
	case operators.Multiply:
		if l, ok := left.(traits.Multiplier); ok {
			return l.Multiply(right)
		}
	case operators.Divide:
		if l, ok := left.(traits.Divider); ok {
			return l.Divide(right)
		}
	}
	return types.NewErr("cannot %s %s and %s", verbs[operator], left.Type().TypeName(), right.Type().TypeName())
}
